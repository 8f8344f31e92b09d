"""The commands of ``hooked-vlm``, one file a family. What is slow to import is imported where it is used."""
