@echo off
rem Loses nodes of a small swarm again and again while eight answers run, and tells what that costs.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" losses %*
exit /b %ERRORLEVEL%
