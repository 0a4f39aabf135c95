"""Records of finished work on disk, so that an interrupted run can be resumed."""
