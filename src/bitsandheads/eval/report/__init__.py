"""One page from many runs: `sources` reads, `content` chooses figures and tables, `svg` and `plots` draw them, `page` writes HTML."""
