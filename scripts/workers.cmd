@echo off
rem What two workers give over one, what gRPC and ZeroMQ cost a token, and what questions come to while workers are killed.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" workers %*
exit /b %ERRORLEVEL%
