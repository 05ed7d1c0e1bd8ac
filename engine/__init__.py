"""The algorithms of the card files made fast, each held to its plain twin by a test; and the edge of every script."""
