@echo off
rem What HTTP costs: tokens per second and the time to the first token, by the API and from Python.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" overhead %*
exit /b %ERRORLEVEL%
