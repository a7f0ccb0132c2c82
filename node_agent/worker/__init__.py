"""The process of a Python behaviour: its runtime, and its end of the worker socket."""
