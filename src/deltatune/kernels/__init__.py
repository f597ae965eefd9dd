"""Fast paths, each beside a reference in plain torch that its tests compare it with."""
