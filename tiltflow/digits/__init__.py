"""The worked example, whole: data, networks, rewards, weights."""
