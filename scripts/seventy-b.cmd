@echo off
rem Nodes with blocks of a 70B's true shapes: what they take, how fast and how exactly they compute, beside what the plan says.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" seventy_b %*
exit /b %ERRORLEVEL%
