"""PEFT network -> Pyro sample sites."""
