"""Layer problems, the leaderboard of solvers on them, gaps to the proven optimum, and times of single operations."""
