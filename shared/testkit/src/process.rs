//! A child process that cannot outlive its test: killed when dropped, and by the kernel when the thread that started it
//! ends in any other way. Start children from a thread that outlives them, such as the test's own.

use std::{
    io,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

pub use nix::sys::signal::Signal;
use nix::{
    sys::{prctl::set_pdeathsig, signal::kill},
    unistd::{Pid, User as SystemUser, geteuid, getpid, getppid},
};

/// How long a process may take to end its own children.
const FAMILY_ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The kernel sends `end` to the command's process when the thread that starts it ends.
pub fn tie_to_parent(command: &mut Command, end: Signal) {
    let parent = getpid();
    let tied = move || {
        set_pdeathsig(end)?;
        // The parent may have died before the line above.
        if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    };
    // SAFETY: between fork and exec the closure makes two system calls, allocates nothing and takes no lock.
    #[expect(unsafe_code, reason = "only a pre-exec closure can set the parent-death signal")]
    unsafe {
        command.pre_exec(tied);
    }
}

/// The account that a database server runs as: our own, except that Postgres refuses root, which gives way to the owner of the
/// data, or to `nobody`.
#[derive(Clone, Copy)]
pub struct Account(Option<(u32, u32)>);

impl Account {
    pub fn for_data(data: &Path) -> io::Result<Self> {
        if !geteuid().is_root() {
            return Ok(Self(None));
        }
        if let Some(meta) = data.metadata().ok().filter(|meta| meta.uid() != 0) {
            return Ok(Self(Some((meta.uid(), meta.gid()))));
        }
        let nobody = SystemUser::from_name("nobody")?.ok_or(io::Error::other("there is no user `nobody`"))?;
        Ok(Self(Some((nobody.uid.as_raw(), nobody.gid.as_raw()))))
    }

    pub fn own(self, path: &Path) -> io::Result<()> {
        self.0.map_or(Ok(()), |(uid, gid)| chown(path, Some(uid), Some(gid)))
    }

    pub fn run(self, command: &mut Command) {
        if let Some((uid, gid)) = self.0 {
            command.uid(uid).gid(gid);
        }
    }
}

pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
    end: Signal,
}

impl Process {
    pub fn start(command: &mut Command) -> io::Result<Self> {
        Self::start_to_end_by(Signal::SIGKILL, command)
    }

    /// For a program with child processes, which end with it on SIGTERM but would survive a SIGKILL.
    pub fn start_family(command: &mut Command) -> io::Result<Self> {
        Self::start_to_end_by(Signal::SIGTERM, command)
    }

    fn start_to_end_by(end: Signal, command: &mut Command) -> io::Result<Self> {
        tie_to_parent(command, end);
        Ok(Self { child: command.spawn()?, status: None, end })
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Does nothing if the process has ended: its pid may belong to another one by now.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let pid = Pid::from_raw(self.child.id().cast_signed());
            kill(pid, signal).expect("a child of ours that was not waited for can be signalled");
        }
    }

    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child of ours can be waited for");
        }
        self.status
    }

    pub fn kill(&mut self) -> ExitStatus {
        self.signal(Signal::SIGKILL);
        let status = self.child.wait().expect("a child of ours can be waited for");
        self.status = Some(status);
        status
    }

    pub async fn wait(&mut self) -> ExitStatus {
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.end != Signal::SIGKILL {
            self.signal(self.end);
            let deadline = Instant::now() + FAMILY_ENDS_WITHIN;
            while self.ended().is_none() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.kill();
    }
}
