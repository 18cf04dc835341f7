"""`python -m fastar_client`, the same as the `fastar-client` command."""

from fastar_client.cli import main

main()
