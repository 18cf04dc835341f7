"""`python -m fastar_client.load`, the same as the `fastar-load` command."""

from fastar_client.load.cli import main

if __name__ == "__main__":  # load processes import it, too
    main()
