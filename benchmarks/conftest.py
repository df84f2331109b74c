import importlib

importlib.import_module("fastblock")  # now, as pytest puts the checkout first on the path once more for the tests
