import ArgumentParser
import CommandLineKit

struct Demo: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Watch a VM move while it runs: two VMs on this machine, verified.",
        discussion: """
            Starts a source and a destination, lets a guest write memory, migrates it live over TCP, checks every page \
            against what the guest must have written, and leaves nothing behind.
            """)

    @Option(
        help: ArgumentHelp("RAM of the VM. (default: 256M)", valueName: "size"),
        transform: { try ByteSize($0) })
    var memory = ByteSize(bytes: 256 << 20)

    @Option(help: ArgumentHelp("Virtual CPUs.", valueName: "n"))
    var cpus = 2

    @Option(
        help: ArgumentHelp(
            "The guest. (default: dirty, writing an eighth of its memory in random order)", valueName: "spec"))
    var guest: String?

    @Option(
        help: ArgumentHelp("How both VMs run their guest, as `run` takes it. (default: kvm)", valueName: "spec"),
        transform: { text in
            _ = try AcceleratorOption(text)
            return text
        })
    var accel = "kvm"

    func run() throws {
        let interruption = try SignalWatch.startFlag()
        let folder = try PrivateFolder("demo")
        defer { folder.remove() }
        let workingSet = max(1, memory.bytes >> 23)
        let demonstration = try Demonstration(
            folder: folder.path, memoryBytes: memory.bytes, cpuCount: cpus, accelerator: accel,
            guest: guest ?? "dirty,working-set=\(workingSet)M,rate=128M,random", interruption: interruption)
        try demonstration.run()
    }
}
