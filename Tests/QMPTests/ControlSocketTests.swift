import Glibc
import Host
import Testing

@testable import QMP

@Suite struct ControlSocketTests {
    /// A folder of a test, removed with what lies in it.
    final class Scratch {
        let path = "/tmp/godwit-test-\(getpid())-\(UInt32.random(in: 0 ... .max))"
        var folder: RuntimeFolder { RuntimeFolder(path: path) }
        deinit {
            for name in (try? FileSystem.names(inFolder: path)) ?? [] { try? FileSystem.remove("\(path)/\(name)") }
            _ = unsafe rmdir(path)
        }
    }

    private func leaveStaleSocket(_ path: String) throws {
        // Its listener is closed and the file stays, as after SIGKILL.
        _ = try Socket.listen(unix: path)
        #expect(try FileSystem.status(of: path)?.kind == .socket)
    }

    @Test("a VM's socket is the user's alone, in a folder that is the user's alone")
    func modes() throws {
        let scratch = Scratch()
        let socket = try ControlSocket(name: VMName("web"), in: scratch.folder)
        #expect(socket.path == "\(scratch.path)/web.qmp")
        #expect(try FileSystem.status(of: socket.path)?.mode == 0o600)
        #expect(try FileSystem.status(of: scratch.path)?.mode == 0o700)
        socket.remove()
        #expect(try FileSystem.status(of: socket.path) == nil)
    }

    @Test("a name is taken while its VM runs, and free once it is gone without a trace or with one")
    func nameTaken() throws {
        let scratch = Scratch()
        let name = try VMName("web")
        var first: ControlSocket? = try ControlSocket(name: name, in: scratch.folder)
        let error = #expect(throws: SystemError.self) { try ControlSocket(name: name, in: scratch.folder) }
        #expect(error?.description.contains("a VM named web is running") == true)
        #expect(try scratch.folder.runningVMs().map(\.name) == [name])
        withExtendedLifetime(first) {}
        first = nil
        #expect(try FileSystem.status(of: scratch.folder.socketPath(of: name))?.kind == .socket)
        let second = try ControlSocket(name: name, in: scratch.folder)
        second.remove()
    }

    @Test("of many who want one name at the same moment exactly one gets it, stale socket or not")
    func race() throws {
        let scratch = Scratch()
        let name = try VMName("web")
        try scratch.folder.prepare()
        try leaveStaleSocket(scratch.folder.socketPath(of: name))
        let won = Monitor<[ControlSocket]>([])
        let folder = scratch.folder
        let threads = try (0..<8).map { number in
            try HostThread(name: "racer-\(number)") {
                if let socket = try? ControlSocket(name: name, in: folder) { won.withLock { $0.append(socket) } }
                _ = try? folder.runningVMs()
            }
        }
        threads.forEach { $0.join() }
        #expect(won.withLock { $0.count } == 1)
        #expect(try folder.runningVMs().map(\.name) == [name])
    }

    @Test("listing tells the VMs that answer and removes sockets that nobody listens on, nothing else")
    func listing() throws {
        let scratch = Scratch()
        #expect(try scratch.folder.runningVMs() == [])
        let alive = try ControlSocket(name: VMName("alive"), in: scratch.folder)
        try leaveStaleSocket("\(scratch.path)/dead.qmp")
        _ = try Descriptor.open("\(scratch.path)/file.qmp", O_WRONLY | O_CREAT)
        _ = try Descriptor.open("\(scratch.path)/notes.txt", O_WRONLY | O_CREAT)
        #expect(try scratch.folder.runningVMs().map(\.socketPath) == [alive.path])
        #expect(try FileSystem.names(inFolder: scratch.path) == ["alive.qmp", "file.qmp", "notes.txt"])
    }

    @Test("removing takes away the own socket only, not that of a successor")
    func removal() throws {
        let scratch = Scratch()
        let first = try ControlSocket(name: VMName("web"), in: scratch.folder)
        try FileSystem.remove(first.path)
        let second = try ControlSocket(name: VMName("web"), in: scratch.folder)
        first.remove()
        #expect(try scratch.folder.runningVMs().map(\.socketPath) == [second.path])
    }

    @Test("a path of any other kind is refused with the reason")
    func refusedPaths() throws {
        let scratch = Scratch()
        try scratch.folder.prepare()
        let live = try ControlSocket(path: "\(scratch.path)/live")
        _ = try Descriptor.open("\(scratch.path)/file", O_WRONLY | O_CREAT)
        for (path, words) in [
            (live.path, "another process listens there"), ("\(scratch.path)/file", "not a socket"),
            ("\(scratch.path)/none/x", "no such file"),
            ("/tmp/" + String(repeating: "x", count: 120), "1 to 107 bytes"),
            ("", "1 to 107 bytes"),
        ] {
            let error = #expect(throws: SystemError.self) { try ControlSocket(path: path) }
            #expect(error?.description.contains(words) == true, "\(path): \(String(describing: error))")
        }
        try leaveStaleSocket("\(scratch.path)/stale")
        _ = try ControlSocket(path: "\(scratch.path)/stale")
    }

    @Test("a folder that others can reach into, or that is none, is refused")
    func refusedFolders() throws {
        let scratch = Scratch()
        try FileSystem.makeFolder(scratch.path, mode: 0o755)
        let open = #expect(throws: SystemError.self) { try scratch.folder.prepare() }
        #expect(open?.description.contains("chmod 700") == true)
        #expect(unsafe chmod(scratch.path, 0o700) == 0)
        try scratch.folder.prepare()
        let link = Scratch()
        #expect(unsafe symlink(scratch.path, link.path) == 0)
        #expect(throws: SystemError.self) { try link.folder.prepare() }
        try FileSystem.remove(link.path)
    }

    @Test("the folder is chosen by the first parent that exists")
    func choice() {
        func choose(_ variable: String?, _ folders: Set<String>) -> String {
            RuntimeFolder.choose(userRuntimeDirectory: variable, userID: 7) { folders.contains($0) }.path
        }
        #expect(choose("/x", ["/x", "/run/user/7"]) == "/x/godwit")
        #expect(choose("/x", ["/run/user/7"]) == "/run/user/7/godwit")
        #expect(choose("x", ["x"]) == "/tmp/godwit-7")
        #expect(choose(nil, []) == "/tmp/godwit-7")
    }

    @Test("names are letters, digits, '-', '_' and '.', at most 63")
    func names() throws {
        for good in ["web", "a", "Web-1_x.y", "0", String(repeating: "n", count: 63)] {
            #expect(try VMName(good).text == good)
        }
        for bad in ["", ".", "..", ".hidden", "-x", "a/b", "a b", "é", "a\0", String(repeating: "n", count: 64)] {
            #expect(throws: QMPError.self, "\(bad)") { try VMName(bad) }
        }
    }
}
