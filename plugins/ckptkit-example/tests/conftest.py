pytest_plugins = ["ckptkit.testing.fixtures"]
