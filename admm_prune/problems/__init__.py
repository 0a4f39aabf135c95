"""Problems: what is lost when weights go, and which sparse set they must land in."""
