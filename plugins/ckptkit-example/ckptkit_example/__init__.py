"""The smallest complete plugin of ckptkit."""
