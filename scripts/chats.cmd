@echo off
rem Many chats at once without a limit, many in a row, and prompts up to the end of the context whose nodes are lost.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" chats %*
exit /b %ERRORLEVEL%
