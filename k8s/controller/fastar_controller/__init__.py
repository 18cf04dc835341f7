"""The stream controller: which pods take new streams, and which one an autoscaler may remove first.

Only labels and annotations of its own namespace's pods are written; streams flow without it.
"""
