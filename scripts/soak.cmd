@echo off
rem Many streaming clients of `petals-win up` for a minute: what they get, and what is left of it.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" soak %*
exit /b %ERRORLEVEL%
