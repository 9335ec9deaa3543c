@echo off
rem Runs lint, types and the check of the patches.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" check %*
exit /b %ERRORLEVEL%
