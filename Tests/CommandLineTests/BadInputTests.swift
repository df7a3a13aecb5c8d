import Glibc
import Host
import TestSupport
import Testing

@Suite("Bad input ends in one sentence and a failure", .serialized)
struct BadInputTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    /// A command line, the words its one sentence must have, and the exit status.
    struct Line: Sendable, CustomTestStringConvertible {
        let arguments: [String]
        let words: [String]
        let status: CInt

        init(_ text: String, _ words: [String], status: CInt = 1) {
            arguments = text.split(separator: " ").map(String.init)
            self.words = words
            self.status = status
        }

        var testDescription: String { arguments.joined(separator: " ") }
    }

    private static let lines: [Line] = [
        Line("run --memory 4097", ["4097", "page size"]),
        Line("run --memory 0", ["0", "page size"]),
        Line("run --machine none --memory 60T --memory-prealloc", ["preallocate", "available", "take less memory"]),
        Line("run --memory 3Q", ["3Q", "--memory"], status: 64),
        Line("run --cpus 0", ["0 vCPUs", "1 to 64"]),
        Line("run --cpus 65", ["65 vCPUs", "1 to 64"]),
        Line("run --cpus many", ["many", "--cpus"], status: 64),
        Line("run --boot-sector /nonexistent/image", ["/nonexistent/image", "no such file"]),
        Line("run --boot-sector /tmp", ["/tmp", "directory"]),
        Line("run --boot-sector /dev/null", ["/dev/null", "empty"]),
        Line("run --kernel /etc/passwd", ["/etc/passwd", "ELF"]),
        Line("run --kernel /nonexistent/vmlinux", ["/nonexistent/vmlinux", "no such file"]),
        Line("run --append x", ["--append", "--kernel"], status: 64),
        Line("run --guest nobody", ["nobody", "idle"]),
        Line("run --guest dirty,rate=fast", ["rate", "fast"]),
        Line("run --guest idle --boot-sector /etc/passwd", ["one of"], status: 64),
        Line("run --accel xen", ["xen", "kvm"], status: 64),
        Line("run --accel kvm,dirty-ring-size=1048576", ["dirty-ring-size=1048576", "256 to"], status: 1),
        Line("run --accel kvm,dirty-ring-size=1000", ["dirty-ring-size '1000'", "a power of two"], status: 64),
        Line("run --accel kvm,dirty-ring-size=", ["dirty-ring-size ''", "a power of two"], status: 64),
        Line("run --accel kvm,dirty-tracking=both", ["dirty-tracking 'both'", "auto, log and ring"], status: 64),
        Line(
            "run --accel kvm,dirty-tracking=log,dirty-ring-size=4096", ["with dirty-tracking=log there is no ring"],
            status: 64),
        Line("run --accel kvm,dirty-bits=7", ["no option 'dirty-bits=7'"], status: 64),
        Line("run --machine q35", ["q35"], status: 64),
        Line("run --name a/b", ["a/b", "letters"], status: 64),
        Line("run --serial telnet:1", ["telnet:1", "stdio"], status: 64),
        Line("run --serial unix:/nonexistent/s", ["/nonexistent/s", "no such file"]),
        Line("run --qmp tcp:1", ["tcp:1", "unix:PATH"], status: 64),
        Line("run --qmp unix:/nonexistent/q", ["/nonexistent/q", "no such file"]),
        Line("run --incoming rdma:host:1", ["rdma", "tcp:"], status: 64),
        Line("run --incoming tcp:127.0.0.1:99999", ["99999", "port"], status: 64),
        Line("run --machine none --memory 1M --incoming unix:/nonexistent/m", ["/nonexistent/m", "no such file"]),
        Line("migrate nobody tcp:127.0.0.1:1", ["nobody", "godwit ps"]),
        Line("migrate nobody rdma:x:1", ["rdma", "tcp:"], status: 64),
        Line("migrate nobody", ["--cancel"], status: 64),
        Line("migrate nobody tcp:127.0.0.1:1 --compress zstd", ["--channels"], status: 64),
        Line("migrate nobody tcp:127.0.0.1:1 --compress xbzrle --channels 2", ["without --channels"], status: 64),
        Line("migrate nobody tcp:127.0.0.1:1 --compress lzma", ["lzma", "zstd"], status: 64),
        Line("migrate nobody tcp:127.0.0.1:1 --downtime 300", ["300", "ms"], status: 64),
        Line("info nobody", ["nobody", "godwit ps"]),
        Line("info nobody weather", ["weather"], status: 64),
        Line("stop nobody", ["nobody"]), Line("cont nobody", ["nobody"]), Line("quit nobody", ["nobody"]),
        Line("reset nobody", ["nobody"]), Line("qmp nobody query-status", ["nobody"]),
        Line("qmp /nonexistent/q.qmp query-status", ["/nonexistent/q.qmp", "no such file"]),
        Line("stream /nonexistent/f", ["/nonexistent/f", "no such file"]),
        Line("stream /tmp", ["/tmp", "directory"]),
        Line("stream /etc/passwd", ["/etc/passwd", "no migration stream"]),
        Line("stream /dev/null", ["/dev/null", "header"]),
        Line("demo --memory 4097", ["source", "4097"]),
        Line("fly", ["fly"], status: 64),
    ]

    @Test("each names the object and the cause", arguments: lines)
    func oneSentence(line: Line) throws {
        let outcome = try bench.run(line.arguments)
        #expect(outcome.status == .exited(line.status), "\(outcome)")
        #expect(outcome.output.isEmpty)
        for word in line.words { #expect(outcome.lastErrorLine.contains(word), "\(outcome)") }
        #expect(outcome.lastErrorLine.hasPrefix("godwit: "))
        // A demonstration shows its steps and its children's words above.
        if line.arguments[0] != "demo" { #expect(outcome.errorLines.count == 1, "\(outcome)") }
        #expect(!outcome.errors.contains("Fatal error") && !outcome.errors.contains("Error("))
    }

    @Test("a boot sector that is too large is refused with its size and the limit")
    func imageTooLarge() throws {
        let path = "\(bench.folder)/large.img"
        try Descriptor.create(path).truncate(to: (480 << 10) + 1)
        let outcome = try bench.run(["run", "--boot-sector", path])
        #expect(outcome.status == .exited(1))
        #expect(outcome.lastErrorLine.contains(path) && outcome.lastErrorLine.contains("480 KiB"), "\(outcome)")
    }

    /// Whether this user may make mount namespaces and change users.
    private static let isRoot = geteuid() == 0

    @Test("no /dev/kvm is a sentence with the remedy", .enabled(if: isRoot, "needs root to hide /dev/kvm"))
    func noKVM() throws {
        let hidden = [
            "unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$@\"", "-",
        ]
        for command in [
            ["run", "--memory", "16M", "--guest", "idle", "--serial", "none"], ["demo", "--memory", "64M"],
        ] {
            let outcome = try bench.run(command, through: hidden)
            #expect(outcome.status == .exited(1), "\(outcome)")
            #expect(outcome.lastErrorLine.contains("/dev/kvm: no such file or directory; load"), "\(outcome)")
        }
        #expect(try leftovers() == [])
    }

    @Test(
        "no permission for /dev/kvm is a sentence with the remedy",
        .enabled(if: othersLackKVM, "needs root, a /dev/kvm closed to others, and a build that others can read"))
    func noPermission() throws {
        let socket = "/tmp/godwit-test-\(getpid()).qmp"
        let outcome = try bench.run(
            ["run", "--memory", "16M", "--guest", "idle", "--serial", "none", "--qmp", "unix:\(socket)"],
            through: Self.asNobody)
        #expect(outcome.status == .exited(1), "\(outcome)")
        #expect(outcome.lastErrorLine.contains("/dev/kvm: permission denied; add yourself"), "\(outcome)")
        #expect(try FileSystem.status(of: socket) == nil)
    }

    private static let asNobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

    /// Whether another user can start the binary, and may not use KVM.
    private static let othersLackKVM: Bool = {
        var status = stat()
        // SAFETY: stat fills the structure.
        guard isRoot, unsafe stat("/dev/kvm", &status) == 0, status.st_mode & 0o6 == 0 else { return false }
        return (try? Workbench().run(["--version"], through: asNobody))?.status == .exited(0)
    }()

    /// What a failed demonstration left behind: nothing, beside our own files.
    private func leftovers() throws -> [String] {
        try FileSystem.names(inFolder: bench.folder).filter { $0.hasPrefix("godwit-demo") }
    }
}
