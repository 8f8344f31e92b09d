"""What the methods are made of: samples made ready, the loop over them, what is patched where, what is measured."""
