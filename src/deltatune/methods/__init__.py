"""One file a method, each reading like its paper."""
