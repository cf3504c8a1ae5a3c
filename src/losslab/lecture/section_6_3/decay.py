C24=None
