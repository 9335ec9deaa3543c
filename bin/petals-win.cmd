@echo off
rem petals-win from a checkout: the first start installs it into .venv, the next ones take no time.
call "%~dp0..\scripts\with-python.cmd" -I -S "%~dp0..\scripts\bootstrap.py" run %*
exit /b %ERRORLEVEL%
