"""Speed on this CPU: attention, decoding, serving and memory, beside full caches and the limit of their bytes."""
