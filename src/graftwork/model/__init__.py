"""PEFT's face: the classes and functions that users of PEFT know, over this library's engine."""
