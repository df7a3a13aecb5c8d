import ArgumentParser
import CommandLineKit
import Glibc
import Host
import MigrationStream
import QMP

struct Stream: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show what a migration stream holds, Godwit's or QEMU's.")

    @Argument(help: ArgumentHelp("The file; - for standard input.", valueName: "file"), completion: .file())
    var path: String

    @Flag(help: "Print JSON.")
    var json = false

    /// Bytes read at a time.
    private static let pieceBytes = 1 << 20

    func run() throws {
        let name = path == "-" ? "standard input" : path
        let file = path == "-" ? try Descriptor.standard(0, name: name) : try Descriptor.open(path, O_RDONLY)
        var summary = StreamSummary()
        var failure: StreamError?
        do {
            while let piece = try file.read(upTo: Self.pieceBytes), !piece.isEmpty {
                try summary.feed(piece)
                try skip(file, &summary)
            }
            try summary.finish()
        } catch let error as StreamError {
            failure = error
        }
        // What came before an error is worth seeing, too.
        if failure == nil || summary.byteCount > 8 {
            Terminal.output.write(json ? summary.json.prettyDescription + "\n" : summary.text)
        }
        if let failure { throw CommandFailure("\(name): \(failure)") }
    }

    /// Pages that have places of their own are not read, where the file can be sought in.
    private func skip(_ file: Descriptor, _ summary: inout StreamSummary) throws {
        guard file.kind == .file, summary.skippableBytes > 0 else { return }
        let (position, size) = (try file.position(), try file.size())
        let count = min(summary.skippableBytes, size - min(size, position))
        try file.seek(to: position + count)
        summary.skip(count)
    }
}

extension StreamSummary {
    var json: JSON {
        [
            "bytes": JSON(byteCount), "complete": .bool(isComplete), "machine": machine.map { .string($0) } ?? .null,
            "blocks": .array(
                blocks.map { block in
                    var members: [String: JSON] = [
                        "name": .string(block.name), "length": JSON(block.length), "data-pages": JSON(block.dataPages),
                        "delta-pages": JSON(block.deltaPages), "zero-pages": JSON(block.zeroPages),
                    ]
                    if let region = block.region {
                        members["marked-pages"] = JSON(block.markedPages)
                        members["bitmap-offset"] = JSON(region.bitmapOffset)
                        members["pages-offset"] = JSON(region.pagesOffset)
                    }
                    return .object(members)
                }),
            "sections": .array(
                sections.map {
                    [
                        "id": JSON($0.id), "name": .string($0.name), "instance": JSON($0.instance),
                        "version": JSON($0.version), "bytes": JSON($0.bytes), "body-bytes": JSON($0.bodyBytes),
                        "rounds": JSON($0.rounds), "ended": .bool($0.ended), "inferred": .bool($0.inferred),
                    ]
                }),
            "commands": .array(
                commands.map {
                    ["position": JSON($0.position), "command": .string(StreamSummary.words($0.command))]
                }),
            "command-count": JSON(commandCount),
        ]
    }
}
