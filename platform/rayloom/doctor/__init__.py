"""`rayloom doctor`: is this machine fit to run jobs, and if not, what is to be done?"""
