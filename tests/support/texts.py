"""A text for tests: plain sentences of a vocabulary that every tokenizer here has."""


def harvest(sentences: int = 400) -> str:
    return "".join(f"In the year {n} the harvest was {n % 7} times as good. " for n in range(sentences))
