"""Adapter folders: PEFT's two files, read and written."""
