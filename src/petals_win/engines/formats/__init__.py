"""How models write what is not plain text: thoughts and calls of tools. `answer` is the base, `table` tells which model writes how."""
