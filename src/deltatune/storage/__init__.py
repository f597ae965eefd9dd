"""How layers store and compute: the known types, and the quantised ones that register themselves."""
