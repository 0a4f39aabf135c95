"""Layer problems, the leaderboard of solvers on them, gaps to the proven optimum, and the parts measured one by one."""
