@echo off
rem Measures 1, 2 and 8 clients of `petals-win up`, on an idle PC and beside a busy program.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" crowd %*
exit /b %ERRORLEVEL%
