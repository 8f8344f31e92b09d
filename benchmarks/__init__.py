"""Where the README's figures come from. Each module is one command that prints one table; none asserts a time."""
