"""Hooks that the whole loop calls by path."""


async def reward(args, sample, **kwargs) -> float:
    """1 for every second response by its length: a random model then gets both rewards in nearly every group."""
    return float(sample.response_length % 2)
