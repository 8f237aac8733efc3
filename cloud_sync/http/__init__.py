"""HTTP as both servers use it: authentication, limits, answers."""
