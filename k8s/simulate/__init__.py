"""The autoscaler that ships, simulated: `python -m k8s.simulate` draws a day of it (k8s/README.md).

`hpa` is the HorizontalPodAutoscaler's rule, checked against a log of the real controller; `fleet` a fleet of servers
with streams; `manifest` reads the policy from what ships; `plot` draws.
"""
