"""Learned pruning: masks on a frozen language model, trained on a text, and what they become."""
