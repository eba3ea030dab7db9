"""`python -m gfldeploy` is the `gfldeploy` command."""

from gfldeploy.cli import main

if __name__ == "__main__":
    main()
