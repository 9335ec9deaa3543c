@echo off
rem Answers by random JSON schemas with the default model: how many are valid, and what it costs.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" schemas %*
exit /b %ERRORLEVEL%
