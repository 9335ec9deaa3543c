@echo off
rem Installs petals-win into .venv, or brings it up to date.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" install %*
exit /b %ERRORLEVEL%
