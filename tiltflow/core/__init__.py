"""The base process as a Gaussian chain: simulate it, weigh its paths, differentiate it."""
