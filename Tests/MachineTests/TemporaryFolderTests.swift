import Glibc
import Host
import TestSupport
import Testing

@Suite("What tests leave behind")
struct TemporaryFolderTests {
    @Test("a child process takes its files with it, whether it comes back or ends by itself", arguments: [false, true])
    func files(exits: Bool) async throws {
        let note = temporaryPath("note-\(exits)")
        await #expect(processExitsWith: .success) { [note = note as String, exits] in
            Child.run(seconds: 20) {
                let folder = temporaryPath("keys")
                try FileSystem.makeFolder(folder)
                try Descriptor.create("\(folder)/keys.psk").writeAll([1])
                try Descriptor.create(note).writeAll(Array(folder.utf8))
                if exits { exit(0) }
            }
        }
        let folder = String(decoding: try Descriptor.contents(of: note), as: UTF8.self)
        #expect(folder.hasSuffix("/keys"))
        #expect(try FileSystem.status(of: folder) == nil)
        #expect(try FileSystem.status(of: String(folder.dropLast("/keys".count))) == nil)
    }

    @Test(
        "a file system that a child mounted is seen by nobody else, and goes with it though it is killed",
        .enabled(if: mayMount, needsMount))
    func mounts() async throws {
        let note = temporaryPath("note-mount")
        await #expect(processExitsWith: .signal(SIGKILL)) { [note = note as String] in
            Child.run(seconds: 20) {
                let folder = temporaryPath("small")
                Child.mount("tmpfs", at: folder, options: "size=1m")
                try Descriptor.create("\(folder)/file").writeAll([1])
                let isSeen = Monitor<Bool?>(nil)
                _ = try HostThread(name: "other") {
                    let status = try? FileSystem.status(of: "\(folder)/file")
                    isSeen.withLock { $0 = status != nil }
                }
                claim(isSeen.wait(deadline: .after(seconds: 5)) { $0 } == true, "its own threads do not see it")
                try Descriptor.create(note).writeAll(Array(folder.utf8))
                kill(getpid(), SIGKILL)
            }
        }
        let folder = String(decoding: try Descriptor.contents(of: note), as: UTF8.self)
        #expect(try FileSystem.names(inFolder: folder).isEmpty)
        #expect(unsafe rmdir(folder) == 0, "it is mounted still")
        unsafe rmdir(String(folder.dropLast("/small".count)))
    }
}
