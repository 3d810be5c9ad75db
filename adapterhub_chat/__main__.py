"""`python -m adapterhub_chat VERB` is the same as `adapterhub-chat VERB`."""

from adapterhub_chat.cli.app import main

if __name__ == "__main__":
    main()
