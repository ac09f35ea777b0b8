"""What makes TAB complete commands: a script for bash, zsh or fish that knows every verb, option, choice and setting.

The script is made once, by `atma completion`, with everything in it: completing runs no Python, so that it is
immediate. Run folders, recipes and files of the reader's own are found by the shell when they are asked for.
"""
