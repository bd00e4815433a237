"""Networks, as ordered lists of named blocks. A model does not depend on ranks or on how it is sharded."""
