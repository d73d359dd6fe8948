"""Publishing of a result: its model card, and its upload to the hub."""
