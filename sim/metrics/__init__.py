"""Records of requests and steps, and every number that is read from them."""
